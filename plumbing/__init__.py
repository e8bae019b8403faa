"""Support code for the six chapters. A reader may skip it. Nothing here imports a chapter."""
import os
import signal
import sys
from pathlib import Path

# Each script imports this package before the large libraries, which take seconds to load. Until
# main() runs, Ctrl-C ends the script without a traceback. In a notebook it works as usual.
script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
if Path(__file__).resolve().parents[1] in script.parents:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
