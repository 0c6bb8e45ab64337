"""Hopper back end in Gluon: persistent, warp-specialised FP8 GEMMs. `pipeline` holds the skeleton and its protocol."""
