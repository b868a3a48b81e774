"""Load a checkpoint in a process of its own, and print what memory that took: `python load_and_measure.py FOLDER`.

`anonymous` is the most that the process had allocated while loading, beyond what it had before, in bytes; pages of the
file itself are not counted, the system can drop them. `weights` are the bytes of the parameters.
"""

import json
import sys
import threading
import time

from ppllava import PPLlavaForConditionalGeneration


def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def main(folder):
    before, peaks, done = anonymous(), [], threading.Event()

    def watch():
        while not done.is_set():
            peaks.append(anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = PPLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    done.set()
    watcher.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"anonymous": max(peaks) - before, "weights": weights, "samples": len(peaks)}))


if __name__ == "__main__":
    main(sys.argv[1])
