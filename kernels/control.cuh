// What a device keeps of a training run by itself, so that the host need not wait for it. The same
// struct is in src/backend/gpu/control.rs.
#pragma once

#include "common.cuh"

struct Control {
    // The run so far.
    double loss_sum;   // of the backward passes since the host last set it
    float loss_scale;  // gradients in half precision are stored times this, a power of two
    int good_steps;    // updates since the scale changed
    int skipped;       // updates left out, because a gradient was not finite
    float loss;        // of the last backward pass
    // The step at hand.
    int overflow;      // a gradient was not finite
    int skip;          // the update is left out
    float rate, root;  // of the update
    // Written by the host.
    float inverse_total;  // one over the sum of the labelled pixels' weights
    float lr, beta1, beta2, eps, weight_decay;
    int step;  // number of this update, from 1, those left out included
    int padding;
    float class_weights[256];  // of each label in the loss
};
