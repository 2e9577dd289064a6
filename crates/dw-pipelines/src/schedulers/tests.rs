//! Every sampler against trajectories of the reference.
