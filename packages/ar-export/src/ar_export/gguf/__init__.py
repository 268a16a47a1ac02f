"""The GGUF container: architectures, metadata, tokenizer, type mix, sink and reader."""
