"""What each command does, with its options and its help, one file per group of commands.

run.py       run and plan
report.py    report, recipes
inspect.py   ls, show, lineage, diff
store.py     adopt, export, verify, gc
chat.py      chat
io.py        options that several commands take, where text and JSON are written

All of them are imported for `posttrain --help`, so what is slow to import (torch, pydantic, jinja2)
is imported inside a command.
"""
