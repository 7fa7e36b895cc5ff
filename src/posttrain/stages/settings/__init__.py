"""What a recipe may write, one room per kind of stage; `stages/config.py` is the register."""
