"""What a model generates, and what it scores: maths, code, chat."""
