"""What each command does, one file per group. `posttrain.cli` has their names and options.

run.py       run and plan
report.py    report, recipes
inspect.py   ls, show, lineage, diff
store.py     adopt, export, verify, gc
chat.py      chat
output.py    where human text and JSON go
"""
