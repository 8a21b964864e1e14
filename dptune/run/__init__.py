"""What a private run is, whoever loops: plan, session, checkpoint, identity."""
