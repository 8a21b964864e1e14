"""Loading models, sharding and quantising them, choosing what is trained, estimating memory."""
