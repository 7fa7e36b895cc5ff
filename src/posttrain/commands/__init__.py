"""What each command does, one file per group. `posttrain.cli` has their names and options.

output.py    where human text and JSON go
run.py       run and plan
report.py    report, recipes
look.py      ls, show, lineage
compare.py   diff, verify
keep.py      adopt, export, gc
chat.py      chat
"""
