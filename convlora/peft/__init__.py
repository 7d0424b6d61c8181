"""Parameter-efficient fine-tuning methods: each injects trainable parts into a frozen image encoder."""
