//! Executors: [`Inference`] and [`Training`] tie a graph, a plan and a backend together.
