"""Operations on tensors, one folder each: the public function, its torch reference, faster forms."""
