//! The loss: softmax cross-entropy, mean over labelled pixels.
