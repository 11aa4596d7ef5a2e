"""The sample world: third-party images and a small real LLM, in the formats of the real data sets.

objects --> scenes --> wording --> pretraining shards, LLaVA JSON, retrieval JSON, POPE and MMBench parquet
easy-VQA (third party) ----------> LLaVA JSON, evaluation parquet
"""
