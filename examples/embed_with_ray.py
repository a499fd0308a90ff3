"""A Ray Data pipeline with vectors: python examples/embed_with_ray.py MODEL_DIR PARQUET OUTPUT

On GPUs: num_gpus=1 and as many actors as GPUs. Whole corpora that must survive anything are better
embedded by `llm2vec-fast embed --ray`, which resumes.
"""

import sys

import ray

from llm2vec_fast.corpus.ray import Embedder

model_dir, source, output = sys.argv[1:]
data = ray.data.read_parquet(source).map_batches(
    Embedder,
    fn_constructor_kwargs={"model": model_dir, "normalize": True, "precision": "float16"},
    compute=ray.data.ActorPoolStrategy(size=1),
    batch_size=1024,
    batch_format="numpy",
)
data.write_parquet(output)
print(f"{ray.data.read_parquet(output).count()} rows with vectors in {output}")
