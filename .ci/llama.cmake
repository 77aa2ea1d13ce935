# For tests, llama.cpp is built without its common library and its tools, its models' graphs sixteen files at a time, and
# hardly optimised: two and a half minutes on two cores instead of many. Nothing here times it.
set(LLAMA_BUILD_COMMON OFF)
set(CMAKE_C_FLAGS_RELEASE "-O1 -DNDEBUG")
set(CMAKE_CXX_FLAGS_RELEASE "-O1 -DNDEBUG")
cmake_language(DEFER CALL set_target_properties llama PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
