"""Training data: LeRobot data sets in, batches out. Reading order: robots, modality, meta, columns, video, lerobot, samples,
statistics, mixture, sampler, loader; writer makes data sets, check looks for damage.
"""
