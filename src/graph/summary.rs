//! Layer table.
