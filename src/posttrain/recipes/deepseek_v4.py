"""DeepSeek-V4: an expert for every domain and effort, merged by full-vocabulary distillation.

Source: DeepSeek-V4, arXiv 2606.19348, section 5.
