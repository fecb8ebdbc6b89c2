"""Operations on a student's embeddings and vocabulary before it is trained."""
