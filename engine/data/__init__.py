"""From video files to uint8 clips on the device.

sources.py        folders, annotation lists and single files -> paths and labels
video.py          what one file holds; manifest.py: what all of them hold; inspect.py: the summary of `mam2 index`
sampling.py       which frames, crop and mask seed a clip gets: a pure function of seed, epoch and video
front_ends.py     who decodes a file: NVDEC, DALI on the CPU, or PyAV; nvdec.py: whether NVDEC works here
decoding.py       frames by PyAV; frame_folders.py: frames as images
dali.py, crops.py crop, resize and flip, by a DALI graph or by PyTorch; vetting.py: what DALI must not be given
renderer.py       one batch: decode, crop, retry clip by clip; outage.py: waits for storage that is away
loader.py         all batches of all epochs, in a thread ahead of the step (prefetch.py); batch.py: what it returns
transcode.py      `mam2 transcode`; synthetic.py: made clips; moved.py: a resumed run whose videos moved
"""
