"""What an attacker can get from a trained model: who was trained on, secrets, and copied passages."""
