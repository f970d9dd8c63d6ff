# llama-cpp-python switches on llama.cpp's library of tools, which its bindings never load: half of the time to build.
set(LLAMA_BUILD_COMMON OFF)
