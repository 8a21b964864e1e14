"""What every program needs around its work: flags, endpoints, signals, trackers, launch lines."""
