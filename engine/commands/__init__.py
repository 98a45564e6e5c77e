"""One module per verb of the command line; `run(arguments)` returns the exit status. See `mam2.engine.cli`.

flags.py      groups of flags that several verbs share; options.py: the recipe as first argument, renamed flags
"""

VERBS = {
    "demo": "write synthetic clips, pre-train on them, measure, write a report",
    "doctor": "show which decoders, kernels and packages this machine uses",
    "recipes": "[RECIPE] [--out FILE]   list the recipes, show the values of one, or write it to a file to change",
    "completion": "bash|zsh|fish   print a script with which the shell completes verbs, recipes and flags",
    "index": "DATA   open every video once: contents, decoders, advice",
    "transcode": "DATA --out FOLDER   re-encode for fast decoding: smaller, with frequent key frames",
    "train-tokenizer": "DATA --out FOLDER   train a VQ model on your clips, measured on held-out clips",
    "convert-tokenizer": "CHECKPOINT --out FILE   convert a VQGAN of taming-transformers to safetensors",
    "tokenize": "RECIPE --data PATH --out CODES   compute the codes of recorded augmentations once",
    "plan": "RECIPE   estimate a run: parameters, FLOPs, bytes, memory, clips/s, hours",
    "pretrain": "RECIPE --data PATH --out RUN   pre-train on a folder or a list of videos",
    "plot": "RUN [RUN …] --out FILE   plot the logs of one or several runs",
    "visualize": "CHECKPOINT [CHECKPOINT …] --data CLIPS --out FOLDER   draw what models predict: pictures, a page",
    "probe": "CHECKPOINT [CHECKPOINT …] --data LIST   linear, attentive and k-NN probes of frozen encoders",
    "neighbors": "CHECKPOINT [CHECKPOINT …] --data LIST --out FOLDER   retrieval and mask propagation without training",
    "embed": "CHECKPOINT --data FOLDER --out FILE   compute feature vectors of videos, as .npy, .parquet or others",
    "finetune": "RECIPE --data LIST --val LIST --checkpoint RUN --out RUN   train a classifier on an encoder",
    "evaluate": "CHECKPOINT --data LIST --out FOLDER   test a classifier with several views per video",
    "predict": "CHECKPOINT --data VIDEOS   print the most probable classes of videos; - reads paths from stdin",
    "export": "CHECKPOINT --to FORMAT --out PATH   export to Hugging Face, VideoMAE's code, torch or ONNX",
}
"""Help text per verb. A hyphen in a verb is an underscore in its module's name."""
