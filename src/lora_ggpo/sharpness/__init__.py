"""How flat a trained model's minimum is: measures and landscapes."""
