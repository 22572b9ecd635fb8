"""Real-time, no-reference quality of live video. Names are filled in at the end of assembly."""
