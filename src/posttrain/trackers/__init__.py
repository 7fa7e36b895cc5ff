"""What a run tells trackers of experiments: Trackio, Weights & Biases, TensorBoard.

    run --> events --> Sink --JSON lines--> process of one tracker: Feed --> Tracker --> its library

Each tracker works in a process of its own (`process.py`), so that one that is slow, prints, hangs
or fails takes nothing from the run. The engine knows nothing of them: they are told the events that
the live view is told.
"""
