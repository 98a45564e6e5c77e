"""The process and its machine; independent of videos and models.

device.py        device, precision, autocast, compiler, determinism, profiler
compile_cache.py the folder of compiled code that runs share
distributed.py   several processes: start, broadcast, agree, end together
signals.py       Ctrl-C and the signals of a scheduler: save first, then end
log.py           RUN/log.txt, log.jsonl, TensorBoard, trackers; its errors never end a run
progress.py      progress bar on a terminal, progress lines elsewhere
peak.py          measures the FLOP per second of matrix products, and GPU memory in use
cuda.py          CUDA graphs; the host's lead over the device
"""
