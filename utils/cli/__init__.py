"""What every program does around its work: flags, locks, signals, trackers, launch lines."""
