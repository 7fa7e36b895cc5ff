"""What a run will take, before it is run: tokens, memory, disk and seconds of every stage.

`about.py` puts it together: what a stage computes (`work.py`, by the table of kinds) on models of
which sizes (`shapes.py`) and rows of which lengths (`lengths.py`); how long that takes by earlier
runs (`history.py`) or by a calibration of the machine (`calibration.py`, `costs.py`); what runs
beside what (`timetable.py`); and what does not fit (`fits.py`). Only `calibration.py` imports
torch, and only where it has to measure.
"""
