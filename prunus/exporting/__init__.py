"""Checkpoints for other programs: GGUF for llama.cpp, ONNX, vLLM; each verified."""
