"""What a run shows while it goes and when it is over: curves, samples, the collapse alarm, the report page."""
