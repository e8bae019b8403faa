"""What the chapters stand on, and a reader may skip. Nothing in here imports a chapter."""
