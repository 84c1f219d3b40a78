"""The one door to a trained policy: observations and instructions in, action chunks out."""
