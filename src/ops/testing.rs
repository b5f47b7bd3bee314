//! Helpers of the operator tests.
