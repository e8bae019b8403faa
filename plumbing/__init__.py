"""What the chapters stand on, and a reader may skip. Nothing in here imports a chapter."""
import os
import signal
import sys
from pathlib import Path

# Each script imports this package before the large libraries, which take seconds. Until main()
# runs, Ctrl-C ends the script without a traceback. In a notebook it keeps its usual meaning.
script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
if Path(__file__).resolve().parents[1] in script.parents:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
