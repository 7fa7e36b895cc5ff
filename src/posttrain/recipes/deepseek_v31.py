"""DeepSeek-V3.1: specialists of one base, distilled by SFT into one model that thinks or does not.

Source: DeepSeek-V3.1 model card; pipeline of V3.1-Terminus in DeepSeek-V3.2-Exp, section 3.
