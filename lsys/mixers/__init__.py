"""Token mixers as everything but their modules knows them: one card each, without torch.

card       what a card says; attention and state: the two families, and what follows for each
exchange   what crosses the ranks of a sequence
registry   all cards: one line a mixer
NAME       the card of one mixer; its module is lsys/model/mixers/NAME.py
"""
