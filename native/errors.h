// The exceptions of the extension. They bear the names of those in pyps/errors.py, which module.cpp turns them into.
#pragma once

#include <stdexcept>

namespace pyps {

// Something the caller asked for is wrong or does not fit; the text says what to change.
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// This model or this cache cannot be joined at all; the text names the architecture and the reason.
struct RefusedError : InputError {
    using InputError::InputError;
};

// llama.cpp or ggml failed at something that should have worked, or its computation was aborted.
struct EngineError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace pyps
