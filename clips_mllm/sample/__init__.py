"""The sample world: real third-party images and a real small LLM, in the formats of the real thing.

objects --> scenes --> wording --> pretraining shards, LLaVA JSON, retrieval JSON, POPE and MMBench parquet
easy-VQA (third party) ----------> LLaVA JSON, evaluation parquet
"""
