"""The methods that are compared with LoRA-GGPO. `table` lists them; the rest is how peft builds the unusual ones."""
