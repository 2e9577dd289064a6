"""Byte-level BPE in CLIP's layout, learnt from the captions.  make_tokenizer.py [DIR]"""
import json, os, random, sys
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from scenes import sample

out = sys.argv[1] if len(sys.argv) > 1 else "tok"
os.makedirs(out, exist_ok=True)
r = random.Random(7)
captions = [sample(r)[1] for _ in range(8000)]
tok = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
tok.normalizer = normalizers.Lowercase()
tok.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tok.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", special_tokens=[]))
vocab, merges = {}, []
for t in alphabet: vocab[t] = len(vocab)
for t in alphabet: vocab[t + "</w>"] = len(vocab)
for m in json.loads(tok.to_str())["model"]["merges"]:
    a, b = m if isinstance(m, list) else m.split(" ")
    if a in vocab and b in vocab and a + b not in vocab:
        merges.append(f"{a} {b}"); vocab[a + b] = len(vocab)
for s in ("<|startoftext|>", "<|endoftext|>"): vocab[s] = len(vocab)
json.dump(vocab, open(f"{out}/vocab.json", "w"), ensure_ascii=False)
open(f"{out}/merges.txt", "w").write("#version: 0.2\n" + "\n".join(merges) + "\n")
print(len(vocab), "tokens")
