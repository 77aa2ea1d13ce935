# For tests, llama.cpp is built without its common library and its tools: 3 minutes of processor time instead of many.
set(LLAMA_BUILD_COMMON OFF)
