"""MNTP, then SimCSE, on your own text: python examples/train_your_own.py MODEL_DIR FILE OUTPUT

FILE has a text a line. What follows sets fields of both trainings: --max_steps 100. Interrupted?
The same command goes on. MODEL_DIR must have the language-model head.
"""

import sys

from llm2vec_fast import LLM2Vec
from llm2vec_fast.train import load, train

model_dir, source, output, *words = sys.argv[1:]
adapters: list[str] = []
for kind in ("mntp", "simcse"):  # each stands on the adapters before it
    given = ["--model_name_or_path", model_dir, "--train_file", source, *words]
    given += ["--output_dir", f"{output}/{kind}"]
    if adapters:
        given += ["--peft_model_name_or_path", *adapters]
    config, _ = load(kind, None, given)
    print(f"{kind}: {train(config)}")
    adapters.append(f"{output}/{kind}")

model = LLM2Vec.from_pretrained(model_dir, adapters)
similar = model.encode(["a small cat", "a kitten"], normalize=True)
print(f"cosine: {float(similar[0] @ similar[1]):.3f}")
model.save(f"{output}/merged", merge_before_save=True)  # one directory, without adapters
