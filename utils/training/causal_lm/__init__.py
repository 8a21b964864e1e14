"""Fine-tuning of a language model, from the flags of train_clm.py to saved files: plan, load, run."""
