"""A private run, independent of the training loop: plan, session, checkpoint, identity."""
