"""What users would write instead of headprobe, each in a process of its own: ``python -m benchmarks.peers.NAME FILE``.

`FILE` is a setting written by `benchmarks.setting`. Every module prints one JSON line: seconds of its loop (decoding
included, imports and building the model not), and how many images are right without and under each mask, with their
mean NLL where it has logits.
"""
