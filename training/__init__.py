"""Shards to a trained, evaluated, registered VideoBERT. Of ours it imports `pipelines.dataset` only."""
